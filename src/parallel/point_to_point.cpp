#include "parallel/point_to_point.hpp"

#include <mpi.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/error.hpp"

namespace upcycle::mpi {
namespace {

constexpr int kExchangeTag = 1, kSendTag = 2;  // a pipeline's messages never meet a collective's

template <class Call>
void in_pieces(Block block, int64_t piece_bytes, Call&& call) {
  for (int64_t begin = 0; begin < block.bytes; begin += piece_bytes) {
    call(block.data + begin, static_cast<int>(std::min(piece_bytes, block.bytes - begin)));
  }
}

std::string explain(int code) {
  std::string words(MPI_MAX_ERROR_STRING, '\0');
  int length = 0;
  if (MPI_Error_string(code, words.data(), &length) != MPI_SUCCESS) return text("error ", code);
  words.resize(static_cast<size_t>(length));
  return words;
}

void check_count(const MPI_Status& status, int expected) {
  int received = 0;
  check(MPI_Get_count(&status, MPI_BYTE, &received), "MPI_Get_count");
  if (received != expected) {
    throw std::runtime_error(
        text("rank ", status.MPI_SOURCE, " of the group sent ", received, " bytes where ", expected, " were expected"));
  }
}

}  // namespace

void check(int code, const char* call) {
  if (code != MPI_SUCCESS) throw std::runtime_error(text(call, ": ", explain(code)));
}

void exchange(int communicator, std::span<const Block> to_each, std::span<const Block> from_each, int64_t piece_bytes) {
  const MPI_Comm comm = MPI_Comm_f2c(communicator);
  const int size = static_cast<int>(to_each.size());
  int rank = 0;
  check(MPI_Comm_rank(comm, &rank), "MPI_Comm_rank");

  std::vector<MPI_Request> requests;
  std::vector<int> expected;
  for (int step = 1; step < size; ++step) {
    const int from = (rank - step + size) % size;
    in_pieces(from_each[from], piece_bytes, [&](std::byte* data, int bytes) {
      expected.push_back(bytes);
      check(MPI_Irecv(data, bytes, MPI_BYTE, from, kExchangeTag, comm, &requests.emplace_back()), "MPI_Irecv");
    });
  }
  for (int step = 1; step < size; ++step) {
    const int to = (rank + step) % size;
    in_pieces(to_each[to], piece_bytes, [&](std::byte* data, int bytes) {
      check(MPI_Isend(data, bytes, MPI_BYTE, to, kExchangeTag, comm, &requests.emplace_back()), "MPI_Isend");
    });
  }
  const Block own = to_each[rank];
  if (own.bytes != from_each[rank].bytes) throw std::logic_error("exchange: a rank disagrees with itself");
  if (own.bytes > 0 && own.data != from_each[rank].data) std::memcpy(from_each[rank].data, own.data, own.bytes);

  std::vector<MPI_Status> statuses(requests.size());
  const int code = MPI_Waitall(static_cast<int>(requests.size()), requests.data(), statuses.data());
  if (code == MPI_ERR_IN_STATUS) {
    for (const MPI_Status& status : statuses) {  // the request that failed, not those which never came to their turn
      if (status.MPI_ERROR != MPI_ERR_PENDING) check(status.MPI_ERROR, "MPI_Waitall");
    }
  }
  check(code, "MPI_Waitall");
  for (size_t i = 0; i < expected.size(); ++i) check_count(statuses[i], expected[i]);
}

void send(int communicator, Block block, int to, int64_t piece_bytes) {
  in_pieces(block, piece_bytes, [&](const std::byte* data, int bytes) {
    check(MPI_Send(data, bytes, MPI_BYTE, to, kSendTag, MPI_Comm_f2c(communicator)), "MPI_Send");
  });
}

void receive(int communicator, Block block, int from, int64_t piece_bytes) {
  in_pieces(block, piece_bytes, [&](std::byte* data, int bytes) {
    MPI_Status status;
    check(MPI_Recv(data, bytes, MPI_BYTE, from, kSendTag, MPI_Comm_f2c(communicator), &status), "MPI_Recv");
    check_count(status, bytes);
  });
}

void broadcast(int communicator, Block block, int root, int64_t piece_bytes) {
  in_pieces(block, piece_bytes, [&](std::byte* data, int bytes) {
    check(MPI_Bcast(data, bytes, MPI_BYTE, root, MPI_Comm_f2c(communicator)), "MPI_Bcast");
  });
}

}  // namespace upcycle::mpi
