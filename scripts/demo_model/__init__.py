"""Data, training and measurement of the chat model that ships with kvchat. Nothing in kvchat
imports this."""
