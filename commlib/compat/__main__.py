"""`python -m commlib.compat`: prints the directory to put on PYTHONPATH."""

from commlib.compat import search_path

print(search_path())
