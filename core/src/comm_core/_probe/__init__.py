"""What this process, host and driver are like: asks, and never raises."""
