# Generators of random numbers: each fork's are its own.

_hooks = []
_generators = []
_memories = {}


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
    # A new seed drops the second of a pair of normal numbers, which is kept for the next call.
    if "random" in modules:
        modules["random"].seed()
        _watch_memory("random", *_twister_of_random(modules["random"]))
    if "numpy.random" in modules:
        modules["numpy.random"].seed()
        _watch_memory("numpy.random", *_twister_of_numpy(modules["numpy.random"]))
    if "uuid" in modules:
        modules["uuid"]._node = None
        modules["uuid"]._last_timestamp = None
    if "tempfile" in modules:
        modules["tempfile"]._name_sequence = None


def _twister_of_random(random):
    """Where the state of random's own Mersenne Twister may lie (CPython, Modules/_randommodule.c: after
    the object's head an int, and 624 words), and what it must be there."""
    if type(random._inst) is not random.Random:
        return None, None, None, None
    index = id(random._inst) + object.__basicsize__
    _, state, _ = random.getstate()
    return index + ctypes.sizeof(ctypes.c_int), index, list(state[:-1]), state[-1]


def _twister_of_numpy(numpy):
    """The same of numpy's (numpy/random/src/mt19937/mt19937.h: 624 words, and an int)."""
    bits = numpy.mtrand._rand._bit_generator
    if type(bits) is not numpy.MT19937:
        return None, None, None, None
    words = bits.ctypes.state_address
    state = bits.state["state"]
    return words, words + 4 * len(state["key"]), state["key"].tolist(), state["pos"]


def _watch_memory(module, words_at, index_at, words, index):
    """Notes where a Mersenne Twister's words lie, each of which may have any value, and the index that
    says that all are used up; if they really lie there. Writing them touches two pages, where a call
    of seed touches thirty."""
    if words is None:
        return
    memory = (ctypes.c_uint32 * len(words)).from_address(words_at)
    where = ctypes.c_int.from_address(index_at)
    if list(memory) == words and where.value == index:
        _memories[module] = memoryview(memory).cast("B"), where, len(words)


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


def _reseed_tls():
    if "_ssl" in sys.modules:
        sys.modules["_ssl"].RAND_add(os.urandom(32), 32.0)


def _reseed(seed):
    """Gives every generator that is loaded a state that no other fork has."""
    modules = sys.modules
    if _generators:
        _reseed_found(seed)
    for words, index, used_up in _memories.values():
        words[:] = os.urandom(len(words))
        index.value = used_up
    if "random" in modules and "random" not in _memories:
        modules["random"].seed(int.from_bytes(seed[:32], "little"))
    if "numpy.random" in modules and "numpy.random" not in _memories:
        words = [int.from_bytes(seed[at : at + 4], "little") for at in range(32, 64, 4)]
        modules["numpy.random"].seed(words)
    _reseed_tls()
    if "multiprocessing.process" in modules:
        modules["multiprocessing.process"].current_process().authkey = os.urandom(32)
    for hook in _hooks:
        hook(seed)
