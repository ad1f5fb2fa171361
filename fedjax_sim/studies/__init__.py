"""Many runs: sweeps and their comparison."""
