"""A prefix of an S3 bucket as a store."""

from jobs.store.s3.store import S3Store

__all__ = ["S3Store"]
