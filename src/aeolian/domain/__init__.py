"""Values, ids, errors, messages and state machines. No I/O; imports nothing else of ours."""
