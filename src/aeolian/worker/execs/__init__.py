"""Commands in running containers, as the worker keeps them."""
