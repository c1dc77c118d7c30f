"""The ordered steps of a container's start, a file each; `base.py` states the interface."""
