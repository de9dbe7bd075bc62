"""What Dagster sees: assets, checks, resources, runs. The only package that imports dagster."""
