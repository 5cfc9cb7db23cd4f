"""Trained models and test sets in, exact counts and intervals out."""
