"""The decoder's forward pass on a processor, in C++ that is compiled once a machine."""
