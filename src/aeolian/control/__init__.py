"""What the platform decides: apps, functions, calls, autoscaling, scheduling, images, storage objects."""
