"""What scripts/gpu_check does, part by part."""
