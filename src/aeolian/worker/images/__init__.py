"""Images on a node: base images, layers, and the builder that runs the client's Dockerfile commands."""
