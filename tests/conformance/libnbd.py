"""Every command, flag and option of the protocol, asked for with libnbd.

    libnbd.py FUNCTION SOCKET NAME      the volume NAME is empty; `other-…` of the same number is there too
"""
import random
import sys

import nbd

SOCKET, NAME = sys.argv[2:4]
OTHER = NAME.replace("disk", "other")
MIB = 1 << 20
# Bad requests go out as they are; but that a payload follows is said where the protocol wants it.
LENIENT = getattr(nbd, "STRICT_AUTO_FLAG", 0)
SIZE = 64 * MIB


def connect(name=NAME, structured=True, contexts=("base:allocation",)):
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    for context in contexts if structured else ():
        h.add_meta_context(context)
    h.set_strict_mode(LENIENT)
    h.set_export_name(name)
    h.connect_unix(SOCKET)
    return h


def fails(errno, call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        assert error.errno == errno, f"wanted {errno}, got {error.errno}: {error}"
        return
    raise AssertionError(f"no error, wanted {errno}")


def requests():
    for structured in (True, False):
        h = connect(structured=structured)
        assert h.get_size() == SIZE
        assert h.get_structured_replies_negotiated() == structured
        assert h.can_fua() and h.can_flush() and h.can_trim() and h.can_zero() and h.can_fast_zero()
        assert h.can_cache() and h.can_multi_conn() and not h.is_read_only() and not h.is_rotational()
        assert h.can_df() == structured
        minimum = h.get_block_size(nbd.SIZE_MINIMUM)
        assert minimum in (1, 512) and h.get_block_size(nbd.SIZE_MAXIMUM) >= 32 * MIB
        h.zero(SIZE, 0)

        # Whole sectors, parts of them, across blocks, the last byte.
        model = bytearray(SIZE)
        for offset, length in ((0, 512), (512, 1), (4095, 4098), (131072 - 7, 14), (SIZE - 1, 1), (5 * MIB - 1, 32 * MIB)):
            data = random.randbytes(length)
            h.pwrite(data, offset)
            model[offset:offset + length] = data
            assert h.pread(length, offset) == data, (offset, length)
        h.pwrite(b"fua" * 1000, 77777, nbd.CMD_FLAG_FUA)
        model[77777:77777 + 3000] = b"fua" * 1000
        h.flush()

        for flags in (0, nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA):
            offset, length = random.randrange(SIZE - 2 * MIB), random.randrange(2 * MIB)
            h.zero(length, offset, flags)
            model[offset:offset + length] = bytes(length)
        for flags in (nbd.CMD_FLAG_FAST_ZERO, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE):
            h.zero(MIB, 8 * MIB, flags)
            model[8 * MIB:9 * MIB] = bytes(MIB)
        # Zeroing that is not fast is refused at once, and then nothing has changed.
        h.pwrite(b"x" * 1024, 9 * MIB)
        model[9 * MIB:9 * MIB + 1024] = b"x" * 1024
        try:
            h.zero(1000, 9 * MIB + 7, nbd.CMD_FLAG_FAST_ZERO)
            model[9 * MIB + 7:9 * MIB + 1007] = bytes(1000)
        except nbd.Error as error:
            assert error.errno in ("ENOTSUP", "EOPNOTSUPP"), error

        # A trim may leave what was there; what it promises is that the rest is untouched.
        for flags in (0, nbd.CMD_FLAG_FUA):
            h.trim(MIB, 20 * MIB + 300, flags)
        got = h.pread(MIB, 20 * MIB + 300)
        assert all(new in (old, 0) for new, old in zip(got, model[20 * MIB + 300:21 * MIB + 300]))
        model[20 * MIB + 300:21 * MIB + 300] = got

        h.cache(SIZE, 0)
        h.cache(1, SIZE - 1)
        h.flush()
        for at in range(0, SIZE, 32 * MIB):
            assert h.pread(32 * MIB, at) == model[at:at + 32 * MIB], at
        # What one connection flushed, another one sees.
        other = connect(structured=not structured)
        assert other.pread(3000, 77777) == model[77777:80777]
        other.pwrite(b"seen", 1234)
        assert h.pread(4, 1234) == b"seen"
        other.shutdown()
        h.shutdown()


def oversized_write(h, structured):
    """An error, or the end of the connection where the protocol lets a server choose; the handle to go on with."""
    extended = getattr(h, "get_extended_headers_negotiated", lambda: False)()
    try:
        h.pwrite(bytes(33 * MIB), 0)
    except nbd.Error as error:
        if error.errno == "EINVAL":
            return h
        assert extended and error.errno in ("ECONNRESET", "EPIPE", "ENOTCONN"), error
        return connect(structured=structured)
    raise AssertionError("a payload beyond the largest was taken")


def bad_requests():
    for structured in (True, False):
        h = connect(structured=structured)
        h.pwrite(b"keep" * 1024, SIZE - 4096)
        for offset, length in ((SIZE, 512), (SIZE - 1, 2), (SIZE - 512, 1024), (1 << 62, 512), ((1 << 63) - 512, 512)):
            fails("EINVAL", h.pread, length, offset)
            fails("ENOSPC", h.pwrite, bytes(length), offset)
            fails("ENOSPC", h.zero, length, offset)
            fails("EINVAL", h.trim, length, offset)
            fails("EINVAL", h.cache, length, offset)
            if structured:
                fails("EINVAL", h.block_status, length, offset, lambda *_: 0)
        assert h.pread(4096, SIZE - 4096) == b"keep" * 1024
        # Flags that a command does not have.
        unknown = 1 << 9
        fails("EINVAL", h.pread, 512, 0, unknown)
        fails("EINVAL", h.pread, 512, 0, nbd.CMD_FLAG_NO_HOLE)
        fails("EINVAL", h.pwrite, bytes(512), 0, nbd.CMD_FLAG_FAST_ZERO)
        fails("EINVAL", h.pwrite, bytes(512), 0, nbd.CMD_FLAG_REQ_ONE)
        fails("EINVAL", h.zero, 512, 0, nbd.CMD_FLAG_DF)
        fails("EINVAL", h.trim, 512, 0, nbd.CMD_FLAG_NO_HOLE)
        fails("EINVAL", h.cache, 512, 0, nbd.CMD_FLAG_DF)
        fails("EINVAL", h.flush, unknown)
        if structured:
            fails("EINVAL", h.block_status, 512, 0, lambda *_: 0, nbd.CMD_FLAG_NO_HOLE)
        else:
            fails("EINVAL", h.pread_structured, 512, 0, lambda *_: 0, nbd.CMD_FLAG_DF)
        # Longer than the largest payload.
        fails("EOVERFLOW" if structured else "EINVAL", h.pread, 33 * MIB, 0)
        h = oversized_write(h, structured)
        # Requests for nothing may succeed or not; what counts is that the connection goes on.
        for call in (lambda: h.pread(0, 0), lambda: h.pwrite(b"", 0), lambda: h.trim(0, 0), lambda: h.zero(0, 0),
                     lambda: h.cache(0, 0)):
            try:
                call()
            except nbd.Error as error:
                assert error.errno == "EINVAL", error
        assert h.pread(4096, SIZE - 4096) == b"keep" * 1024
        h.shutdown()
    # Block status without a context that was selected.
    h = connect(contexts=())
    fails("EINVAL", h.block_status, 512, 0, lambda *_: 0)
    assert h.pread(4, SIZE - 4096) == b"keep"
    h.shutdown()


def structured():
    h = connect()
    h.pwrite(b"D" * MIB, 2 * MIB)
    h.pwrite(b"E" * 700, 5 * MIB + 100)
    expected = bytearray(8 * MIB)
    expected[2 * MIB:3 * MIB] = b"D" * MIB
    expected[5 * MIB + 100:5 * MIB + 800] = b"E" * 700

    def read(flags):
        chunks, seen = [], bytearray(8 * MIB)

        def chunk(data, offset, status, _):
            chunks.append((offset, len(data), status))
            assert status in (nbd.READ_DATA, nbd.READ_HOLE)
            if status == nbd.READ_HOLE:
                data = bytes(len(data))
            seen[offset:offset + len(data)] = data

        assert h.pread_structured(8 * MIB, 0, chunk, flags) == expected
        chunks.sort()
        assert seen == expected
        at = 0
        for offset, length, _ in chunks:
            assert offset == at, chunks
            at += length
        assert at == 8 * MIB
        return chunks

    assert any(status == nbd.READ_HOLE for _, _, status in read(0))
    assert len(read(nbd.CMD_FLAG_DF)) == 1
    # A chunk callback that fails does not end the connection.
    fails("EINVAL", h.pread_structured, 512, SIZE, lambda *_: 0)
    assert h.pread(4, 2 * MIB) == b"DDDD"
    h.shutdown()


def block_status():
    h = connect()
    for at in range(4, 12, 2):
        h.pwrite(b"d" * MIB, at * MIB)
    h.pwrite(b"1", 40 * MIB + 1)
    h.zero(MIB, 6 * MIB)
    h.trim(MIB, 8 * MIB)

    def status(length, offset, flags=0):
        found = []

        def extents(context, at, entries, _):
            assert context == "base:allocation" and at == offset
            found.extend(zip(entries[::2], entries[1::2]))

        h.block_status(length, offset, extents, flags)
        assert found and all(extent > 0 for extent, _ in found)
        assert all(first[1] != second[1] for first, second in zip(found, found[1:])), found
        return found

    extents, at = {}, 0
    while at < SIZE:
        for length, flags in status(SIZE - at, at):
            extents[at] = (length, flags)
            at += length
    assert at == SIZE

    def flags_at(offset):
        start = max(begin for begin in extents if begin <= offset)
        return extents[start][1]

    hole = nbd.STATE_HOLE | nbd.STATE_ZERO
    assert flags_at(0) == hole and flags_at(4 * MIB) == 0 and flags_at(10 * MIB) == 0
    assert flags_at(6 * MIB) & nbd.STATE_ZERO and flags_at(8 * MIB) & nbd.STATE_ZERO
    assert flags_at(40 * MIB + 1) == 0 and flags_at(50 * MIB) == hole
    # One extent, no longer than asked for. Without the flag the last may be longer.
    one = status(2 * MIB, 3 * MIB, nbd.CMD_FLAG_REQ_ONE)
    assert one == [(MIB, hole)], one
    assert status(1, 4 * MIB + 7, nbd.CMD_FLAG_REQ_ONE) == [(1, 0)]
    assert h.can_meta_context("base:allocation") and not h.can_meta_context("base:other")
    h.shutdown()


def opt():
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.connect_unix(SOCKET)
    return h


def options():
    h = opt()
    assert h.get_protocol() == "newstyle-fixed"
    names = {}
    h.opt_list(lambda name, description: names.update({name: description}) or 0)
    assert NAME in names and OTHER in names, names
    # Asked about, refused and asked again, in one connection.
    for _ in range(3):
        h.set_export_name("nothing")
        fails("ENOENT", h.opt_info)
        fails("ENOENT", h.opt_go)
        h.set_export_name(NAME)
        h.set_full_info(True)
        h.opt_info()
        assert h.get_size() == SIZE and h.get_canonical_export_name() == NAME and h.get_export_description()
        h.set_export_name(OTHER)
        h.opt_info()
        assert h.get_size() == MIB
    h.set_export_name(NAME)
    contexts = []
    h.opt_list_meta_context(lambda context: contexts.append(context) or 0)
    assert "base:allocation" in contexts, contexts
    for query, found in (("base:", True), ("base:allocation", True), ("base:nothing", False), ("other:", False)):
        contexts.clear()
        h.clear_meta_contexts()
        h.add_meta_context(query)
        h.opt_list_meta_context(lambda context: contexts.append(context) or 0)
        assert ("base:allocation" in contexts) == found, (query, contexts)
    h.clear_meta_contexts()
    h.add_meta_context("base:allocation")
    h.add_meta_context("x-nobody:knows")
    h.opt_go()
    assert h.can_meta_context("base:allocation") and not h.can_meta_context("x-nobody:knows")
    h.pread(512, 0)
    h.shutdown()

    h = opt()
    h.opt_abort()

    # What was selected for one disk does not count for another.
    if hasattr(nbd.NBD, "opt_set_meta_context"):
        h = opt()
        h.set_request_meta_context(False)
        h.set_strict_mode(LENIENT)
        h.set_export_name(OTHER)
        h.add_meta_context("base:allocation")
        selected = []
        h.opt_set_meta_context(lambda context: selected.append(context) or 0)
        assert selected == ["base:allocation"], selected
        h.set_export_name(NAME)
        h.opt_go()
        fails_or_none = None
        try:
            h.block_status(512, 0, lambda *_: 0)
        except nbd.Error as error:
            fails_or_none = error.errno
        assert fails_or_none in ("EINVAL", "ENOTSUP", "EOPNOTSUPP"), fails_or_none
        assert h.pread(512, 0) is not None
        h.shutdown()

    # Structured replies asked for late, once, and twice.
    if hasattr(nbd.NBD, "opt_structured_reply"):
        h = nbd.NBD()
        h.set_request_structured_replies(False)
        h.set_opt_mode(True)
        h.connect_unix(SOCKET)
        assert h.opt_structured_reply()
        h.set_export_name(NAME)
        h.opt_go()
        assert h.get_structured_replies_negotiated() and h.can_df()
        h.shutdown()

    # Neither fixed flags nor NO_ZEROES: the oldest client there is.
    h = nbd.NBD()
    h.set_handshake_flags(0)
    h.set_export_name(NAME)
    h.connect_unix(SOCKET)
    assert h.get_size() == SIZE
    assert h.pread(512, 0) is not None
    h.shutdown()


def many():
    """Requests of all kinds in flight, each in a stretch of its own, against a copy in memory."""
    handles = [connect(structured=number % 2 == 0) for number in range(4)]
    stretches, stretch = 64, SIZE // 64
    model = [bytearray(stretch) for _ in range(stretches)]
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    for round_number in range(40):
        under_way = []
        for index in range(stretches):
            h = chance.choice(handles)
            offset = chance.randrange(stretch - 1)
            length = chance.randrange(1, min(stretch - offset, 200_000) + 1)
            at = index * stretch + offset
            kind = chance.choice(("write", "write", "zero", "read"))
            part = slice(offset, offset + length)
            if kind == "write":
                data = chance.randbytes(length)
                buffer = nbd.Buffer.from_bytearray(bytearray(data))
                cookie = h.aio_pwrite(buffer, at, flags=chance.choice((0, 0, nbd.CMD_FLAG_FUA)))
                model[index][part] = data
                under_way.append((h, cookie, None, None))
            elif kind == "zero":
                cookie = h.aio_zero(length, at, flags=chance.choice((0, nbd.CMD_FLAG_NO_HOLE)))
                model[index][part] = bytes(length)
                under_way.append((h, cookie, None, None))
            else:
                buffer = nbd.Buffer(length)
                under_way.append((h, h.aio_pread(buffer, at), buffer, bytes(model[index][part])))
        while under_way:
            for h in handles:
                if any(waiting[0] is h for waiting in under_way):
                    h.poll(10)
            left = []
            for h, cookie, buffer, expected in under_way:
                if not h.aio_command_completed(cookie):
                    left.append((h, cookie, buffer, expected))
                elif buffer is not None:
                    assert buffer.to_bytearray() == expected, f"seed {seed} round {round_number}"
            under_way = left
    for index in range(stretches):
        assert handles[index % 4].pread(stretch, index * stretch) == model[index], f"seed {seed} stretch {index}"
    for h in handles:
        h.shutdown()


def extended():
    """Extended headers: requests beyond 4 GiB, and 64-bit block status. The volume has 1 TiB."""
    size = 1 << 40
    h = nbd.NBD()
    h.add_meta_context("base:allocation")
    h.set_strict_mode(LENIENT)
    h.set_export_name(NAME)
    h.connect_unix(SOCKET)
    assert h.get_extended_headers_negotiated() and h.get_structured_replies_negotiated() and h.get_size() == size
    assert h.can_block_status_payload() in (True, False)

    def status(length, offset, flags=0):
        found = []

        def extents(context, at, entries, _):
            assert context == "base:allocation" and at == offset
            found.extend(entries)

        h.block_status_64(length, offset, extents, flags)
        assert all(extent > 0 for extent, _ in found)
        return found

    hole = nbd.STATE_HOLE | nbd.STATE_ZERO
    # A server may answer for less than it was asked, but for more than 32 bits hold.
    empty = status(size, 0)
    assert len(empty) == 1 and empty[0][0] > 1 << 32 and empty[0][1] == hole, empty
    far = 900 << 30
    h.pwrite(b"far" * 1000, far + 5)
    h.pwrite(b"near" * 1000, MIB)
    assert h.pread(3000, far + 5) == b"far" * 1000
    at, data = 0, 0
    while at < size:
        for length, state in status(size - at, at):
            at += length
            data += length if state == 0 else 0
    assert at == size and 7000 <= data <= 16 * MIB, data
    one = status(size - 2 * MIB, 2 * MIB, nbd.CMD_FLAG_REQ_ONE)
    assert len(one) == 1 and one[0][1] == hole and one[0][0] > 1 << 32, one
    # Longer than 32 bits hold.
    h.cache(MIB, far)
    h.zero(5 << 30, far - (1 << 30), nbd.CMD_FLAG_FAST_ZERO)
    assert h.pread(3000, far + 5) == bytes(3000)
    assert h.pread(4000, MIB) == b"near" * 1000
    h.pwrite(b"again" * 100, far, nbd.CMD_FLAG_FUA)
    h.trim(size - 2 * MIB, 2 * MIB)
    assert h.pread(500, far) == bytes(500)
    h.flush()
    # Bad requests keep their errors, and the connection.
    fails("EINVAL", h.pread, 512, size)
    fails("ENOSPC", h.pwrite, bytes(512), size)
    fails("ENOSPC", h.zero, 1 << 40, 1 << 39)
    fails("EINVAL", h.trim, 1 << 40, 1 << 39)
    fails("EOVERFLOW", h.pread, 33 * MIB, 0)
    fails("EINVAL", h.block_status_64, 1 << 62, 0, lambda *_: 0)
    if h.can_block_status_payload():
        seen = []
        h.block_status_filter(size, 0, ["base:allocation"], lambda name, *_: seen.append(name) or 0)
        assert seen == ["base:allocation"], seen
    chunks = []
    h.pread_structured(8 * MIB, 0, lambda data, offset, kind, _: chunks.append((offset, len(data))) or 0)
    assert sum(length for _, length in chunks) == 8 * MIB
    h.shutdown()

    # A client that does not ask for them gets what it had before.
    h = nbd.NBD()
    h.set_request_extended_headers(False)
    h.set_export_name(NAME)
    h.connect_unix(SOCKET)
    assert not h.get_extended_headers_negotiated() and h.get_structured_replies_negotiated()
    assert h.pread(4000, MIB) == b"near" * 1000
    h.shutdown()


def changed_since():
    """What changed since the snapshot 1: the first of these writes came before it, the others after it."""
    context_name = "blockhouse:changed-since:1"
    h = connect(contexts=("base:allocation", context_name))
    assert h.can_meta_context(context_name)
    changed = bytearray(SIZE // 65536)

    def extents(context, at, entries, _):
        if context != context_name:
            return
        for length, state in zip(entries[::2], entries[1::2]):
            for unit in range(at // 65536, min(-(-(at + length) // 65536), len(changed))):
                changed[unit] |= state & 1
            at += length

    at = 0
    while at < SIZE:
        h.block_status(MIB, at, extents)
        at += MIB
    assert not changed[0] and not changed[3 * 16], "what was written before the snapshot"
    assert changed[10 * 16] and changed[20 * 16], "what was written or discarded after it"
    assert sum(changed) * 65536 < 4 * MIB, sum(changed)
    h.shutdown()
    h = connect(contexts=("blockhouse:changed-since:77",))
    assert not h.can_meta_context("blockhouse:changed-since:77")
    h.shutdown()


def tls():
    """TLS with certificates over TCP: tls.py … PORT and the directory of the certificates."""
    port, certificates = sys.argv[4:6]

    def client(tls, certificate=True):
        h = nbd.NBD()
        h.set_tls(tls)
        if certificate:
            h.set_tls_certificates(certificates)
        h.set_export_name(NAME)
        return h

    h = client(nbd.TLS_REQUIRE)
    h.connect_tcp("localhost", port)
    assert h.get_tls_negotiated() and h.get_structured_replies_negotiated()
    data = random.randbytes(5 * MIB)
    h.pwrite(data, 4097, nbd.CMD_FLAG_FUA)
    assert h.pread(len(data), 4097) == data
    h.flush()
    h.shutdown()
    # Neither without TLS nor with a certificate of nobody.
    fails_to_connect(client(nbd.TLS_DISABLE), port)
    h = client(nbd.TLS_REQUIRE, certificate=False)
    fails_to_connect(h, port)


def fails_to_connect(h, port):
    try:
        h.connect_tcp("localhost", port)
    except nbd.Error:
        return
    raise AssertionError("connected")


if __name__ == "__main__":
    globals()[sys.argv[1]]()
