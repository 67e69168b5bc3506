"""The Python targets: each a module with ``run(data)``, which returns for any bytes or has found something."""
