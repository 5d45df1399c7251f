"""Measurements of atlasvi and of its peers."""
