"""Conversion of an untied MoE checkpoint into a tied one, and back."""
