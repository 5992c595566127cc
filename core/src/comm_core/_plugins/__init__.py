"""The installed backends: found by metadata, validated against the hook specs, loaded one by one."""
