package comfyuitest

import (
	"bytes"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

func inBubble(t *testing.T, f func(t *testing.T, client, pod *pipeConn)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		client, pod := newPipe("pod")
		f(t, client, pod)
	})
}

func TestPipeBuffers(t *testing.T) {
	inBubble(t, func(t *testing.T, client, pod *pipeConn) {
		big := bytes.Repeat([]byte("x"), pipeBuffer+100)
		written := make(chan int, 1)
		go func() {
			n, _ := client.Write(big)
			written <- n
		}()
		synctest.Wait()
		require.Empty(t, written, "the buffer is full")
		got, err := io.ReadAll(io.LimitReader(pod, 100))
		require.NoError(t, err)
		require.Len(t, got, 100)
		require.Equal(t, len(big), <-written)
		require.NoError(t, client.Close())
		got, err = io.ReadAll(pod)
		require.NoError(t, err)
		require.Len(t, got, pipeBuffer, "what was written before the end is read")
		_, err = pod.Write([]byte("x"))
		require.ErrorIs(t, err, syscall.EPIPE)
		_, err = client.Read(make([]byte, 1))
		require.ErrorIs(t, err, net.ErrClosed)
		_, err = client.Write([]byte("x"))
		require.ErrorIs(t, err, net.ErrClosed)
	})
}

func TestPipeReset(t *testing.T) {
	inBubble(t, func(t *testing.T, client, pod *pipeConn) {
		waiting := make(chan error, 1)
		_, err := pod.Write([]byte("before"))
		require.NoError(t, err)
		pod.reset()
		got := make([]byte, 10)
		n, err := client.Read(got)
		require.NoError(t, err)
		require.Equal(t, "before", string(got[:n]))
		_, err = client.Read(got)
		require.ErrorIs(t, err, syscall.ECONNRESET)
		_, err = client.Write(got)
		require.ErrorIs(t, err, syscall.ECONNRESET)

		client, pod = newPipe("pod")
		go func() {
			_, err := client.Read(make([]byte, 1))
			waiting <- err
		}()
		synctest.Wait()
		pod.reset()
		require.ErrorIs(t, <-waiting, syscall.ECONNRESET)
	})
}

func TestPipeDeadlines(t *testing.T) {
	inBubble(t, func(t *testing.T, client, pod *pipeConn) {
		began := time.Now()
		require.NoError(t, client.SetReadDeadline(began.Add(time.Minute)))
		_, err := client.Read(make([]byte, 1))
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		require.Equal(t, time.Minute, time.Since(began))
		var timeout net.Error
		require.ErrorAs(t, err, &timeout)
		require.True(t, timeout.Timeout())

		require.NoError(t, client.SetDeadline(time.Time{}))
		failed := make(chan error, 1)
		go func() {
			_, err := client.Write(make([]byte, 2*pipeBuffer))
			failed <- err
		}()
		synctest.Wait()
		require.NoError(t, client.SetWriteDeadline(time.Now().Add(-time.Second)))
		require.ErrorIs(t, <-failed, os.ErrDeadlineExceeded)
		require.NoError(t, client.SetDeadline(time.Now().Add(time.Second)))
		require.NoError(t, client.SetDeadline(time.Now().Add(time.Hour)))
		go func() {
			time.Sleep(time.Minute)
			_, _ = pod.Write([]byte("y"))
		}()
		n, err := client.Read(make([]byte, 1))
		require.NoError(t, err)
		require.Equal(t, 1, n)
		require.NoError(t, client.SetDeadline(time.Time{}))
	})
}

// TestPipeCarriesAll: whatever the sizes of reads and writes, the bytes come as they were sent.
func TestPipeCarriesAll(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		client, pod := newPipe("pod")
		chunks := rapid.SliceOf(rapid.SliceOfN(rapid.Byte(), 0, 5000)).Draw(t, "chunks")
		go func() {
			for _, chunk := range chunks {
				_, _ = client.Write(chunk)
			}
			_ = client.Close()
		}()
		got, err := io.ReadAll(io.LimitReader(&shortReader{pod, rapid.IntRange(1, 2000).Draw(t, "read size")}, 1<<30))
		require.NoError(t, err)
		require.Equal(t, string(bytes.Join(chunks, nil)), string(got))
	})
}

type shortReader struct {
	r    io.Reader
	size int
}

func (s *shortReader) Read(p []byte) (int, error) { return s.r.Read(p[:min(len(p), s.size)]) }
