"""Train IP-Adapters from the command line (installed under the import name ``ipadapter_trainer``)."""
