"""Database and blob store: the only rooms that know SQL or object storage."""
