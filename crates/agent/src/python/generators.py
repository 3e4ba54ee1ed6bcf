# Generators of random numbers: each fork's are its own.

_hooks = []
_generators = []
_memories = []


def register_after_fork(function):
    """Calls function(seed: bytes) in every fork, before any of its user's code."""
    _hooks.append(function)
    return function


def _find_generators():
    """The generators that the warm-up has left, but for those of the modules themselves."""
    kinds, known = [], []
    if "random" in sys.modules:
        random = sys.modules["random"]
        kinds.append(random.Random)
        known.append(random._inst)
    if "numpy.random" in sys.modules:
        numpy = sys.modules["numpy.random"]
        # What a Generator or a RandomState draws from is a BitGenerator.
        kinds += [numpy.RandomState, numpy.BitGenerator]
        known += [numpy.mtrand._rand, numpy.mtrand._rand._bit_generator]
    kinds = tuple(kinds)
    known = set(map(id, known))
    return [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), kinds) and id(thing) not in known
    ]


def _watch_generators():
    """Finds what is to be reseeded, and does before the snapshot what is the same in every fork."""
    _generators.extend(_find_generators())
    modules = sys.modules
    if "numpy.random" in modules:
        # Drops the second of a pair of normal numbers, which it keeps for the next call.
        modules["numpy.random"].seed()
        memory = _memory_of(modules["numpy.random"])
        if memory is not None:
            _memories.append(memory)
    if "uuid" in modules:
        modules["uuid"]._node = None
        modules["uuid"]._last_timestamp = None
    if "tempfile" in modules:
        modules["tempfile"]._name_sequence = None


def _memory_of(numpy):
    """The words of numpy's own Mersenne Twister, any of which may have any value, and the index that
    says that all are used up (numpy/random/src/mt19937/mt19937.h); None if they are not found."""
    bits = numpy.mtrand._rand._bit_generator
    if type(bits) is not numpy.MT19937:
        return None
    address = bits.ctypes.state_address
    words = (ctypes.c_uint32 * 624).from_address(address)
    index = ctypes.c_int.from_address(address + ctypes.sizeof(words))
    state = bits.state["state"]
    if list(words) != state["key"].tolist() or index.value != state["pos"]:
        return None
    return memoryview(words).cast("B"), index, len(words)


def _reseed_found(seed):
    for index, generator in enumerate(_generators):
        entropy = index << (8 * len(seed)) | int.from_bytes(seed, "little")
        if "random" in sys.modules and isinstance(generator, sys.modules["random"].Random):
            generator.seed(entropy)
            continue
        numpy = sys.modules["numpy.random"]
        if isinstance(generator, numpy.BitGenerator):
            generator.state = type(generator)(numpy.SeedSequence(entropy)).state
        else:
            # The second of a pair of normal numbers, which it keeps for the next call.
            generator.set_state({**generator.get_state(legacy=False), "has_gauss": 0, "gauss": 0.0})


def _reseed(seed):
    """Gives every generator that is loaded a state that no other fork has."""
    modules = sys.modules
    if _generators:
        _reseed_found(seed)
    if "random" in modules:
        modules["random"].seed(int.from_bytes(seed[:32], "little"))
    for words, index, used_up in _memories:
        words[:] = os.urandom(len(words))
        index.value = used_up
    if "numpy.random" in modules and not _memories:
        words = [int.from_bytes(seed[at : at + 4], "little") for at in range(32, 64, 4)]
        modules["numpy.random"].seed(words)
    if "_ssl" in modules:
        modules["_ssl"].RAND_add(os.urandom(32), 32.0)
    if "multiprocessing.process" in modules:
        modules["multiprocessing.process"].current_process().authkey = os.urandom(32)
    for hook in _hooks:
        hook(seed)
