"""Federated training for hospitals over a NATS bus."""

__version__ = "0.1.0"
