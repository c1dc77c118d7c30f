"""Ways to run a container: `process` (fork server), `native` (crun), later `gvisor`; `base.py` states the interface."""
