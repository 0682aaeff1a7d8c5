"""The trained model: loading it, changing it on the instance, and the module that owns its forward."""
