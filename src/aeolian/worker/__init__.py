"""What happens on a node: runtimes, image builds, root file systems, volumes, logs, container sockets."""
