"""Installed backends: found by their metadata, loaded one by one, validated against the hook specs."""
