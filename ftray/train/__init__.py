"""Placing a run on Ray, stepping it with DeepSpeed, surviving failures."""
