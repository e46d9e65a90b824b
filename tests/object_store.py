"""An S3 server on loopback, and a file system whose connections break."""

import contextlib
import os
from typing import ClassVar
from unittest import mock

import fsspec
from fsspec import AbstractFileSystem
from fsspec.spec import AbstractBufferedFile

ENVIRONMENT = {
  "AWS_ACCESS_KEY_ID": "test",
  "AWS_SECRET_ACCESS_KEY": "test",
  "AWS_DEFAULT_REGION": "us-east-1",
}


@contextlib.contextmanager
def s3_server():
  """Yields the URL of an empty bucket of a moto server, which the environment names."""
  import boto3
  from moto.server import ThreadedMotoServer

  server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
  server.start()
  host, port = server.get_host_and_port()
  environment = {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
  try:
    with mock.patch.dict(os.environ, environment):
      boto3.client("s3").create_bucket(Bucket="speech")
      yield "s3://speech"
  finally:
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


class BreakingFileSystem(AbstractFileSystem):
  """`breaking://`: objects in memory; requests raise the errors of `errors`, one each."""

  protocol = "breaking"
  store: ClassVar[dict[str, bytes]] = {}
  errors: ClassVar[list[Exception | None]] = []

  @classmethod
  def request(cls) -> None:
    if cls.errors and (error := cls.errors.pop(0)) is not None:
      raise error

  def ls(self, path, detail=True, **options):
    self.request()
    folder = path.rstrip("/") + "/"
    return [
      {"name": name, "size": len(content), "type": "file"}
      for name, content in self.store.items()
      if name == path or name.startswith(folder)
    ]

  def info(self, path, **options):
    if path not in self.store:
      raise FileNotFoundError(path)
    return self.ls(path)[0]

  def _open(self, path, mode="rb", block_size=None, **options):
    return _BreakingFile(self, path, mode, block_size=100, **options)


class _BreakingFile(AbstractBufferedFile):
  def _fetch_range(self, start, end):
    self.fs.request()
    return self.fs.store[self.path][start:end]


fsspec.register_implementation("breaking", BreakingFileSystem, clobber=True)
