"""The vocabulary of the platform: specs, settings, schema, paths, ledger, errors. No I/O, no third-party imports."""
