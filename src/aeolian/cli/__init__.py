"""The `aeolian` command: up, worker, connect, doctor, token, status."""
