"""Aeolian: a self-hosted serverless cloud for AI inference, driven by the official `modal` client."""

__version__ = "0.1.0"
