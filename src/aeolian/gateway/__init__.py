"""The HTTP face: blobs, volume blocks, and later web endpoints, dashboard and metrics."""
