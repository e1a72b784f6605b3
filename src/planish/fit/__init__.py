"""Fitting quantizers: one loop over spans of blocks, and what minimises a span's loss."""
