"""Attacks by what lies in a contribution's folder: names, links, other things than files, sizes, archives."""

from __future__ import annotations

import contextlib
import os
import socket
import zipfile

from fedcompose.adapter import MAX_WEIGHTS_BYTES
from fedcompose.files import MAX_JSON_BYTES
from fedcompose.folder import MAX_ENTRIES
from tests.attacks.attack import Cases, Contribution, hardlink, symlink, with_file, with_signed_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def fifo(attack: Contribution) -> None:
    attack.path(CONFIG).unlink()
    os.mkfifo(attack.path(CONFIG))


def unix_socket(attack: Contribution) -> None:
    """A file that is none; a device would need the administrator to make it."""
    attack.path(CONFIG).unlink()
    with contextlib.chdir(attack.folder), socket.socket(socket.AF_UNIX) as server:
        server.bind(CONFIG)  # a relative name, because a socket's name is short


def folder_in_place_of_a_file(attack: Contribution) -> None:
    moved = attack.path(CONFIG).read_bytes()
    attack.path(CONFIG).unlink()
    attack.path(CONFIG).mkdir()
    (attack.path(CONFIG) / CONFIG).write_bytes(moved)


def linked_folder(attack: Contribution) -> None:
    moved = attack.folder.with_name("moved")
    attack.folder.rename(moved)
    attack.folder.symlink_to(moved, target_is_directory=True)


def out_of_the_folder(attack: Contribution) -> None:
    """A link inside that is a folder elsewhere."""
    attack.path("more").symlink_to("/etc", target_is_directory=True)


def dangling(attack: Contribution) -> None:
    attack.path("README.md").symlink_to("nowhere")


def huge_weights(attack: Contribution) -> None:
    """Two gigabytes that take no room on the attacker's disk."""
    os.truncate(attack.path(WEIGHTS), MAX_WEIGHTS_BYTES + 1)


def zipped(attack: Contribution) -> None:
    """An archive in the place of weights; one that unpacks to much more would not be unpacked either."""
    with zipfile.ZipFile(attack.path("more.zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(WEIGHTS, bytes(1 << 20))
    attack.path("more.zip").replace(attack.path(WEIGHTS))
    attack.sign()


def a_flood(attack: Contribution) -> None:
    for number in range(MAX_ENTRIES + 1):
        attack.path(f"{number}").touch()


def not_utf8(attack: Contribution) -> bytes:
    """A name that no text can hold."""
    return os.fsencode(attack.folder) + b"/\xff\xfe"


def a_long_name(attack: Contribution) -> None:
    attack.path("\x1b[2J" + "x" * 200).write_bytes(b"x")


FILES: Cases = {
    "extra-pickle": (with_file("adapter_model.bin"), "FILE_UNEXPECTED"),
    "extra-key": (with_file("site-a.pub"), "FILE_UNEXPECTED"),
    "extra-tokenizer": (with_file("tokenizer.json"), "FILE_UNEXPECTED"),
    "extra-chat-template": (with_file("chat_template.jinja"), "FILE_UNEXPECTED"),
    "extra-code": (with_file("modeling_llama.py"), "FILE_UNEXPECTED"),
    "extra-gitignore": (with_file(".gitignore"), "FILE_UNEXPECTED"),
    "extra-in-dot-git": (with_file(".git/hooks/x"), "FILE_UNEXPECTED"),
    "extra-in-dot-github": (with_file(".github/x.py"), "FILE_UNEXPECTED"),
    "extra-case-twin": (with_file("Adapter_config.json"), "FILE_UNEXPECTED"),
    "extra-look-alike": (with_file("\u0430dapter_config.json"), "FILE_UNEXPECTED"),
    "extra-composed-twin": (with_file("r\u00e9sum\u00e9"), "FILE_UNEXPECTED"),
    "extra-backslash": (with_file("..\\x"), "FILE_UNEXPECTED"),
    "extra-with-an-escape": (a_long_name, "FILE_UNEXPECTED"),
    "extra-not-utf8": (lambda a: os.close(os.open(not_utf8(a), os.O_CREAT | os.O_WRONLY)), "FILE_UNEXPECTED"),
    "empty-folder": (lambda a: a.path("empty").mkdir(), "FOLDER_EMPTY"),
    "deep-folders": (with_file("a/b/c/d/e"), "FILE_UNEXPECTED"),
    "folder-in-place-of-a-file": (folder_in_place_of_a_file, "FILE_UNEXPECTED"),
    "file-removed": (lambda a: a.path(WEIGHTS).unlink(), "FILE_MISSING"),
    "file-renamed": (lambda a: a.path(WEIGHTS).rename(a.path("weights.safetensors")), "FILE_UNEXPECTED"),
    "weights-altered": (lambda a: a.rewrite(WEIGHTS, lambda data: data[:-1] + bytes([data[-1] ^ 1])), "FILE_CHANGED"),
    "weights-altered-into-nonsense": (lambda a: a.rewrite(WEIGHTS, lambda data: data[::-1]), "FILE_CHANGED"),
    "configuration-altered": (lambda a: a.rewrite(CONFIG, lambda data: data + b" "), "FILE_CHANGED"),
    "readme-unsigned": (with_file("README.md"), "FILE_UNSIGNED"),
    "symbolic-link": (symlink(CONFIG), "FILE_NOT_REGULAR"),
    "symbolic-link-to-nothing": (dangling, "FILE_NOT_REGULAR"),
    "symbolic-link-to-a-folder": (out_of_the_folder, "FILE_NOT_REGULAR"),
    "symbolic-link-as-the-folder": (linked_folder, "FILE_NOT_REGULAR"),
    "hard-link": (hardlink(CONFIG), "FILE_LINKED"),
    "fifo": (fifo, "FILE_NOT_REGULAR"),
    "socket-or-device": (unix_socket, "FILE_NOT_REGULAR"),
    "weights-over-the-limit": (huge_weights, "FILE_TOO_LARGE"),
    "configuration-over-the-limit": (with_signed_file(CONFIG, b"{}" + b" " * MAX_JSON_BYTES), "FILE_TOO_LARGE"),
    "readme-over-the-limit": (with_signed_file("README.md", b"x" * (64 << 10) + b"x"), "FILE_TOO_LARGE"),
    "flood-of-files": (a_flood, "FOLDER_TOO_LARGE"),
    "archive": (zipped, "SAFETENSORS_INVALID"),
}
