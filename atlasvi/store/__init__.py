"""Atlases on disk: ingest, opening, fields and statistics."""
