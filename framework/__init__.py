"""Tenfold's trainer: configuration, model, losses, data, engine, evaluation and tracking."""
