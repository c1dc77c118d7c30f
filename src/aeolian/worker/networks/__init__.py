"""Networks of containers: a bridge of this worker, a network namespace for each container, and the ways in and out."""
