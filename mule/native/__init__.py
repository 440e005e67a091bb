"""C++ that is compiled once a machine, where a processor would otherwise be left half used."""
