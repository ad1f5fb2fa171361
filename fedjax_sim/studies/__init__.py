"""Many runs: sweeps and their comparison, searches of settings."""
