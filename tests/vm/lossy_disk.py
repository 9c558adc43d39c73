"""A disk that forgets: at a power cut, what was not flushed is old or new, page by page.

Killing an emulator proves nothing about FLUSH: what it had handed to this machine's kernel survives in every cache mode.
So this disk is a small NBD server, and its volatile cache is the memory of this process.

Owns: the disk, its cache, and what a power cut leaves.
Does not own: the emulator, which is its only client.
"""
import os
import random
import socket
import struct
import threading

# The unit that is lost or kept as a whole: never less than what the disk calls a sector.
PAGE = 4096
# Pages that wait unflushed. Beyond it the oldest half is written, as a real disk does.
PAGES_MAX = 64 << 10
REQUEST_BYTES_MAX = 32 << 20

OPTION_MAGIC = b"IHAVEOPT"
OPT_ABORT, OPT_INFO, OPT_GO = 2, 6, 7
REP_ACK, REP_INFO, REP_UNSUPPORTED = 1, 3, 1 << 31 | 1
READ, WRITE, DISCONNECT, FLUSH, TRIM, ZEROES = 0, 1, 2, 3, 4, 6
FUA = 1
# HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES.
EXPORT_FLAGS = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6
EINVAL = 22


class LossyDisk:
    def __init__(self, path, address, seed):
        self.fd = os.open(path, os.O_RDWR)
        self.size = os.fstat(self.fd).st_size
        self.chance = random.Random(seed)
        self.waiting = {}  # page -> what was written to it since the last flush, oldest first
        self.flushes = 0
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(address))
        listener.listen(1)
        self.thread = threading.Thread(target=self.serve, args=(listener,), daemon=True)
        self.thread.start()

    def power_off(self, cut):
        """Once the emulator is gone. Says what was lost; a disk whose power was not cut writes all."""
        self.thread.join()
        lost = 0
        for page, versions in self.waiting.items():
            kept = self.chance.randint(0, len(versions)) if cut else len(versions)
            lost += kept < len(versions)
            if kept:
                os.pwrite(self.fd, versions[kept - 1], page * PAGE)
        os.close(self.fd)
        return f"{self.flushes} flushes, {len(self.waiting)} pages waiting, {lost} of them lost"

    def read(self, offset, length):
        content = bytearray(os.pread(self.fd, length, offset))
        for page in range(offset // PAGE, -(-(offset + length) // PAGE)):
            versions = self.waiting.get(page)
            if versions:
                start, end = max(page * PAGE, offset), min((page + 1) * PAGE, offset + length)
                content[start - offset:end - offset] = versions[-1][start - page * PAGE:end - page * PAGE]
        return content

    def write(self, offset, content):
        for at in range(0, len(content), PAGE):
            self.waiting.setdefault((offset + at) // PAGE, []).append(bytes(content[at:at + PAGE]))
        if len(self.waiting) > PAGES_MAX:
            self.write_out(list(self.waiting)[:PAGES_MAX // 2])

    def write_out(self, pages):
        for page in pages:
            os.pwrite(self.fd, self.waiting.pop(page)[-1], page * PAGE)

    def serve(self, listener):
        client = listener.accept()[0]
        listener.close()
        stream = client.makefile("rb", buffering=1 << 20)

        def take(length):
            content = stream.read(length)
            if len(content) < length:
                raise EOFError
            return content

        try:
            if self.shake_hands(client, take):
                while self.request(client, take):
                    pass
        except (EOFError, ConnectionError):
            pass  # killed

    def shake_hands(self, client, take):
        client.sendall(b"NBDMAGIC" + OPTION_MAGIC + struct.pack(">H", 3))
        take(4)
        while True:
            magic, option, length = struct.unpack(">8sII", take(16))
            assert magic == OPTION_MAGIC
            take(length)

            def reply(kind, content=b""):
                client.sendall(struct.pack(">QIII", 0x3E889045565A9, option, kind, len(content)) + content)

            if option in (OPT_INFO, OPT_GO):
                reply(REP_INFO, struct.pack(">HQH", 0, self.size, EXPORT_FLAGS))
                reply(REP_INFO, struct.pack(">HIII", 3, PAGE, PAGE, REQUEST_BYTES_MAX))
                reply(REP_ACK)
                if option == OPT_GO:
                    return True
            elif option == OPT_ABORT:
                reply(REP_ACK)
                return False
            else:
                reply(REP_UNSUPPORTED)

    def request(self, client, take):
        _, flags, command, cookie, offset, length = struct.unpack(">IHHQQI", take(28))
        payload = take(length) if command == WRITE else b""
        answer, error = b"", 0
        whole = offset % PAGE == 0 and length % PAGE == 0
        if command == READ:
            answer = self.read(offset, length)
        elif command == WRITE and whole:
            self.write(offset, payload)
        elif command in (TRIM, ZEROES) and whole:
            self.write(offset, bytes(length))
        elif command == DISCONNECT:
            return False
        elif command != FLUSH:
            error = EINVAL
        if command == FLUSH or flags & FUA:
            self.write_out(list(self.waiting))
            self.flushes += 1
        client.sendall(struct.pack(">IIQ", 0x67446698, error, cookie) + answer)
        return True
