"""Tile tables and limits of each architecture, as data."""
