"""Repositories on the Hugging Face Hub as a store."""

from jobs.store.hub.store import HubStore

__all__ = ["HubStore"]
