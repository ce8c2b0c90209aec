"""A pytest plugin: diffusers' own test classes of a Wan transformer then get models under DAX's exact plan.

It is loaded by the name `vendor_suite`, since `tests` is the checkout's package there: see test_vendor_suite.py.
"""

from functools import cache

CHANNELS = {"in_channels": 16, "out_channels": 16, "vace_in_channels": 96}  # of a Wan; the vendor's tests have less
INPUTS = {"hidden_states": "in_channels", "control_hidden_states": "vace_in_channels"}


@cache
def optimized(vendor: type) -> type:
    """The vendor's class, but what it makes or loads is under DAX."""
    import dax

    def under_dax(model):
        dax.optimize(model, "exact")
        return model

    class Making(type(vendor)):
        loading = False  # what is being loaded has no weights yet

        def __call__(cls, *args, **kwargs):
            model = super().__call__(*args, **kwargs)
            return model if Making.loading else under_dax(model)

    class Optimized(vendor, metaclass=Making):
        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            Making.loading = True
            try:
                model = super().from_pretrained(*args, **kwargs)
            finally:
                Making.loading = False
            return under_dax(model)

    Optimized.__name__ = Optimized.__qualname__ = vendor.__name__
    return Optimized


def pytest_collection_modifyitems(items):
    for cls in {item.cls for item in items}:
        change(cls)


def change(cls) -> None:
    """Give a test class models under DAX, and inputs of as many channels as a Wan has."""
    vendor, config = cls().model_class, cls().get_init_dict()
    inputs, init = cls.get_dummy_inputs, cls.get_init_dict
    wider = {key: channels for key, channels in CHANNELS.items() if key in config}

    def widened(self, *args, **kwargs):
        given = inputs(self, *args, **kwargs)
        for name, key in INPUTS.items():
            if name in given:
                given[name] = given[name].repeat(1, CHANNELS[key] // config[key], 1, 1, 1)
        return given

    cls.model_class = property(lambda self: optimized(vendor))
    cls.get_init_dict = lambda self: init(self) | wider
    cls.get_dummy_inputs = widened
    cls.input_shape = cls.output_shape = property(lambda self: (16, 2, 16, 16))
