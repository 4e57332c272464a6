"""What the tests of parts share: a text, and the datastore that one process builds of it."""

from __future__ import annotations

from tests.datastore.parted import text, tokenizer, whole

__all__ = ["text", "tokenizer", "whole"]
