"""Requests, sampling, chunked prefill and continuous-batching decode, in one process. Chapters 04 and 05."""
