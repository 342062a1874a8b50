"""Measurements that print their own figures."""
