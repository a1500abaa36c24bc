"""What runtimes load: contracts as data, and what reads them."""
