"""Stand-ins for packages that a CPU machine cannot run."""
