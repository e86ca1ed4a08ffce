"""Messages and service descriptors of the openbook.v1 protocol, generated from openbook.proto and knowledge_base.proto by `make stubs`."""
