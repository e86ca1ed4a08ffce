"""Messages and service descriptors of the openbook.v1 protocol, generated from openbook.proto by `make stubs`."""
