"""Originals rebuilt from torch's primitives."""
